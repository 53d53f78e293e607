"""A candidate file that does not import."""

raise RuntimeError("the data set is not here")
