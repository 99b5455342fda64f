"""Contains pure functions of arrays, without Flax: retrieval, addressing, lookup, sums of row gradients."""
