from ultramem_jax.accounting.model import *  # noqa
