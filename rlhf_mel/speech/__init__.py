"""Speech: mels and audio files, text, reference clips, a recognizer, and every measure."""
