"""Pure functions on tensors: stage 1, the indexes of stage 2, and attention. Needs torch only.

Tensors without a stated dtype have any floating-point dtype, the same for queries, keys and values.
"""
