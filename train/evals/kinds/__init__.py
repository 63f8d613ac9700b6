"""train.evals.kinds"""
