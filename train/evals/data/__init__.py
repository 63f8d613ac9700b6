"""Images as people have them on disk: what lies where, checked on entry, never decoded here.

images.py    places, labelled images, captioned images: what every reader gives
listing.py   one folder -> samples: class folders or tars;  parquet.py: Parquet
imagenet.py, pets.py, cars.py   published data sets in the layout they are downloaded in
captions.py  COCO captions, Karpathy's splits, Flickr30k, tars with captions
overlap.py   test images that the training part holds too, by their bytes
sets.py      `--data KIND:DIR` -> a data set with both parts
"""
