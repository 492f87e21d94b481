"""On-disk formats of quantized weights, one file each."""
