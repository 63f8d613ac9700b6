"""Losses from padded label ids and the IDF table, taken together with the head's matrix product; no dense target is ever made."""
