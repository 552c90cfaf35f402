"""A thinner wire: quantizer, kernels, collectives, hook, wire meter. Knows nothing of translation."""
