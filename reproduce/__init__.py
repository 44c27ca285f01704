"""Runs the paper's tables and figures: `python -m reproduce ITEM [DATA]`; see __main__.py."""
