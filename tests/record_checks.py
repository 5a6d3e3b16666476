"""What every source has to keep to, checked on its records."""

import pickle
from functools import partial

PICKLED = 300  # bytes of a record without its captions: four million of them are written to a spool file


def check_records(records):
    """Small pickles that read the same bytes, text only, and one string for path and origin."""
    for record in records:
        data = pickle.dumps(record)
        assert len(data) - sum(len(text) + 8 for text in record.captions) <= PICKLED, (len(data), record)
        again = pickle.loads(data)
        assert again == record or (again.key, again.origin) == (record.key, record.origin)
        assert again.read() == record.read()
        assert isinstance(record.read, partial)
        assert all(isinstance(argument, str | int) for argument in record.read.args)
        if record.read.args[0] == record.origin:
            assert record.read.args[0] is record.origin  # so that a pickle holds it once
    return records
