"""preprocess.readers"""
