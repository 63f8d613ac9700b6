"""train.data"""
