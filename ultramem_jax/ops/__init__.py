"""Pure functions of arrays, without Flax: retrieval, addressing, lookup and the sums of row gradients."""
