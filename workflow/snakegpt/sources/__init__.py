"""Where corpora come from: package registries, the Hugging Face hub, URLs and local files."""
