"""
A file from the network, known by its sha256.
"""
import hashlib
import os
import sys

import requests


def download(url, path, sha256):
    """
    Fetch `url` into the file `path`, unless it is there; returns `path`. What has another sha256 is never kept:
    the file appears under its name when it is whole and right.
    """
    if not os.path.exists(path):
        try:
            response = requests.get(url, timeout=30)
            response.raise_for_status()
        except requests.RequestException as error:
            sys.exit(f'{url} could not be fetched ({type(error).__name__}): give a copy of it as --input=FILE')
        if hashlib.sha256(response.content).hexdigest() != sha256:
            sys.exit(f'{url} has changed: its sha256 is not {sha256}')
        with open(path + '.tmp', 'wb') as file:
            file.write(response.content)
        os.replace(path + '.tmp', path)
    return path


def read_text(path):
    """The text in a file of UTF-8."""
    try:
        with open(path, encoding='utf-8', newline='') as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f'{path}: {getattr(error, "strerror", None) or "it is not UTF-8 text"}')
