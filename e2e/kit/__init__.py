"""What the demo and the end-to-end scenarios share: kubectl as a typed function, the chart's installation, waiting."""
