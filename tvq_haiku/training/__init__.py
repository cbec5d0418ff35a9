"""One training update: losses, gradients, optimizers.

Precision: `TransformerConfig.precision` sets the dtype of matrix products and activations. These
values are float32 with every policy, because bfloat16 would lose small updates and cannot count
past 256:
  - parameters, among them the codebooks' moving averages, and gradients
  - optimizer state; only the momentum of Lion is bfloat16
  - codebooks, distances between keys and codes, and quantized keys
  - attention scores, and the maximum and normalizer of the softmax
  - counts and mean values of the compressive cache
  - logits, log-likelihoods, losses, metrics and learning rates
"""
