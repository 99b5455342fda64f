"""Names what devices exchange in a training step.

A collective of the compiled step carries the name of its purpose (`ultramem_jax.ops.exchanges`), and the
formula for its bytes has the same name (`ultramem_jax.accounting.communication`). So a plan can set one
beside the other.
"""

# Lookup of a memory, forward and backward.
READS_TO_OWNERS = "reads to owners"
SCORES_TO_OWNERS = "scores to owners"
POOLED_SUMS_TO_TOKENS = "pooled sums to tokens"
COTANGENTS_TO_OWNERS = "cotangents to owners"
SCORE_GRADIENTS_TO_TOKENS = "score gradients to tokens"

# Pre-values, forward and backward.
INPUTS_TO_OWNERS = "inputs of pre-values to owners"
PRODUCTS_TO_TOKENS = "products to tokens"
PRODUCT_COTANGENTS_TO_OWNERS = "cotangents of products to owners"
INPUT_GRADIENTS_TO_TOKENS = "gradients of inputs to tokens"

# Update of the rows.
READS_AND_COTANGENTS_TO_REPLICAS = "reads and cotangents to replicas"
READS_TO_REPLICAS = "reads to replicas"
SELECTION_OF_ROWS = "scores of the best rows"
MEANS_OVER_COLUMNS = "means over the columns of rows"
GRADIENTS_OF_TABLES = "gradients of tables"

# Mixture of Experts.
LOADS_OF_EXPERTS = "loads of experts"
TOKENS_TO_EXPERTS = "tokens to experts and back"
OVERFLOW_OF_EXPERTS = "overflow of experts"
SUMS_OVER_EXPERTS = "sums over experts"
GRADIENTS_OF_EXPERTS = "gradients of experts"

# Dense layers, whose collectives the compiler adds, and the rest of a step.
GRADIENTS_OF_PARAMETERS = "gradients of parameters"
BALANCE_LOSSES = "balance losses"
PARAMETERS_FOR_THE_STEP = "parameters for the step"
SUMS_OVER_TENSOR = "activations over tensor"
LOSSES_AND_METRICS = "losses and metrics"
