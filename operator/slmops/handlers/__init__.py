"""The only importer of `kopf`: watches wake the queue, the queue runs passes."""
