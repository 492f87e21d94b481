"""What quantization cost: perplexity, captions, answers, divergence from the reference, speed, memory."""
