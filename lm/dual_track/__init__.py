"""The dual-track language model: model, layout of its windows, decoding and sampling (P B.1, 5.2)."""
