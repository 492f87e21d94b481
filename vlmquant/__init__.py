"""vlmquant: quantize vision-language models per component, and prove what it cost."""

__version__ = "0.1.0"
