"""The only home of transformers: loading, layout, replay, the packed layer and its loader."""
