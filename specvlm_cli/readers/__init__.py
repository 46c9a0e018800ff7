"""Videos read in killable child processes: a hang, a crash or a memory bomb costs one video its time limit.

A read server process, started once, holds the decoders and no models; for every video it forks a child, which has
its own limits, opens the file, decodes, and hands the frames over in sealed shared memory. It knows no ledger
and no captions.
"""

from specvlm_cli.readers.jobs import Limits as Limits
from specvlm_cli.readers.jobs import ReadFailure as ReadFailure
from specvlm_cli.readers.jobs import ReadJob as ReadJob
from specvlm_cli.readers.pool import DecodingPool as DecodingPool
from specvlm_cli.readers.shared import ReadVideo as ReadVideo
from specvlm_cli.readers.shared import SharedFrames as SharedFrames
from specvlm_cli.readers.shared import open_frames as open_frames
