"""Images → ranges: data sets, and what the activations of a graph are on them."""
