"""Class names of the published data sets, and the class of each value in their label files.

A table maps a value to a class, or to None where the pixel is ignored. A value without an entry is an error.
"""

from __future__ import annotations

from collections.abc import Mapping

Ids = Mapping[int, int | None]


VOC = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
VOC_IDS: Ids = {label: label for label in range(21)} | {255: None}

_ADE20K = """
    background, wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person,
    earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug,
    field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard,
    chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case,
    pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill,
    bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus,
    towel, light, truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, dirt track,
    apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain,
    conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike,
    cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen,
    blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor,
    bulletin board, shower, radiator, glass, clock, flag
"""
ADE20K = tuple(" ".join(_ADE20K.split()).split(", "))
"""Of the scene parsing benchmark. Class 0, everything else, counts as a class in JAFAR's protocol."""
ADE20K_IDS: Ids = {label: label for label in range(151)}

CITYSCAPES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
    *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)
_TRAINED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CITYSCAPES_IDS: Ids = dict.fromkeys(range(256)) | {label: index for index, label in enumerate(_TRAINED)}
"""From the `labelIds` files to the 19 classes that are evaluated; all else is ignored."""

COCOSTUFF27 = (
    *("electronic", "appliance", "food", "furniture", "indoor", "kitchen", "accessory", "animal", "outdoor"),
    *("person", "sports", "vehicle", "ceiling", "floor", "food (stuff)", "furniture (stuff)", "raw material"),
    *("textile", "wall", "window", "building", "ground", "plant", "sky", "solid", "structural", "water"),
)
_THINGS = ((9, 1), (11, 8), (8, 6), (7, 10), (6, 8), (10, 10), (5, 8), (2, 10), (3, 10), (0, 6), (1, 6), (4, 8))
_STUFF = (
    *(17, 17, 22, 20, 20, 22, 15, 25, 16, 13, 12, 12, 17, 17, 23, 15, 15, 17, 15, 21, 15, 25, 13, 13, 13, 13, 13, 22),
    *(26, 14, 14, 15, 22, 21, 21, 24, 20, 22, 15, 17, 16, 15, 22, 24, 21, 17, 25, 16, 21, 17, 22, 16, 21, 21, 25, 21),
    *(26, 21, 24, 20, 17, 14, 21, 26, 15, 23, 20, 21, 24, 15, 24, 22, 25, 15, 20, 17, 17, 22, 14, 18, 18, 18, 18, 18),
    *(18, 18, 26, 26, 19, 19, 24),
)
_COARSE = (*(coarse for coarse, count in _THINGS for _ in range(count)), *_STUFF)
COCOSTUFF27_IDS: Ids = dict(enumerate(_COARSE)) | {255: None}
"""From the 182 fine labels of the stuffthingmaps (91 things, which lie in runs, then 91 kinds of stuff) to the 12 + 15
supercategories, as PiCIE and STEGO number them."""
