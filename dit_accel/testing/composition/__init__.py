"""What users do with a pipeline, beside each mechanism: a matrix of cells of one outcome each, written as a table."""
