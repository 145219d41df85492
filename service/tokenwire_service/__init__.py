"""Tokenwire's gateway: gRPC chat in front of OpenAI-compatible upstreams."""
