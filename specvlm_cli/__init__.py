"""The batch tool: folders of videos in, Parquet files of captions out.

It knows files, jobs, progress and exit codes. It does not know how a caption is made: that is `specvlm`,
which is imported only once there is work to do.
"""
