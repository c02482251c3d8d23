"""Medical anomaly detection: liver tumours in CT, learned without any tumour label."""
