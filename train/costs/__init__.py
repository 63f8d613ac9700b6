"""What a model needs: operations, parameters, messages; memory."""
