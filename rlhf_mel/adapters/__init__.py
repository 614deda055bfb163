"""Policies made of other packages' models; docs/foreign_flows.md says how to write one.

`matcha`    Matcha-TTS

An f5-tts CFM that is already in memory: `rlhf_mel.f5.live`.
"""
