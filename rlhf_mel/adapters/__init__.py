"""Policies made of other packages' models; docs/foreign_flows.md says how to write one.

`f5_live`   an f5-tts CFM that is already in memory
`matcha`    Matcha-TTS
"""
