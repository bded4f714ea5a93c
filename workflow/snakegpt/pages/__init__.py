"""The pages that people read: one per experiment, and the index over all of them."""
