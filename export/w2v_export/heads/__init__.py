"""What a checkpoint holds beside its encoder: recognised by its weights, and rebuilt as modules of the graph."""
