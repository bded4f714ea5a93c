"""From text to a trained, evaluated and reported GPT, as content-addressed stages."""
