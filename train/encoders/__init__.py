"""train.encoders"""
