"""Parts that several families are made of: weights, norms, convolutions, attention, layers, losses.

A block computes in the dtype of its input and keeps its parameters in float32, so a family chooses
its dtype once, where the inputs enter. Parameters carry logical axes; every block's `__call__` has
its named scope. No file here holds candidates.
"""
