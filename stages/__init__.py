"""The stages of dvc.yaml, one file each: `python -m stages.NAME`.

Python imports this package before the stage, so params.yaml is refused here, in well under two seconds, before the
stage imports torch.
"""

import sys

if sys.argv[0] == "-m":  # so it is only while Python looks for the module that it will run
    from pipeline.files import Files
    from pipeline.stage.params_file import ParamsError, load

    try:
        load(Files.here().params)
    except ParamsError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
