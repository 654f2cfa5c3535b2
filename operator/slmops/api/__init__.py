"""What users write (one module per kind) and what pods read (`run`). Pydantic only; imports nothing else of ours."""
