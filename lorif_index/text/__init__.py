"""Text: language models and passages on top of the engine, and the demo."""
