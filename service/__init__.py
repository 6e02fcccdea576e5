"""The HTTP service: pictures in, COCO instance masks out.

Nothing is imported here: `dsg predict` draws with `dsg.service.overlay`, also where no server is installed. A server
is started by `dsg.service.run.serve`; `dsg.service.app.create_app` makes its application.
"""
