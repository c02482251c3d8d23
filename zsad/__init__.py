"""Industrial zero-shot anomaly detection. This release holds the liver flow; the scorers come with the next."""
