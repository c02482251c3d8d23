def best_encoder():
    raise NotImplementedError
