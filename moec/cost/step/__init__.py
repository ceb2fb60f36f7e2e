"""What a run does beside its graph: the loss, the exchange of gradients, the optimizer."""
