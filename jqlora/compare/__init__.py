"""Certificates of equality with transformers, PEFT and bitsandbytes, for any checkpoint."""

from jqlora.compare.certificate import Certificate, Question, compare
from jqlora.compare.page import write_certificate

__all__ = ["Certificate", "Question", "compare", "write_certificate"]
