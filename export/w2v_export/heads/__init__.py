"""The heads of a checkpoint (classifiers, CTC, x-vectors): recognised by their weights, and rebuilt as modules."""
