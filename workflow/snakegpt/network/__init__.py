"""What the wire between nodes and the nodes themselves do for training, and the settings that follow."""
