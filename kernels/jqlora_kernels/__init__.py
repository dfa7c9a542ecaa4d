"""Block-quantized storage as array operations: raw arrays and static integers in, arrays out."""
