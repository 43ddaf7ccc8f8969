"""Where data comes from: the documentation data set, the packaged start model, data by their names elsewhere."""
