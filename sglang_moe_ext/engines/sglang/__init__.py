"""What we know about SGLang, 0.5.8 to 0.5.23."""
