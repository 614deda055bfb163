"""F5-TTS: its flow, backbones and files, and the fast ways to run them."""
