"""preprocess.betons"""
